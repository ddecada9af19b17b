"""What `import cogvideox_sat` offers to programs and notebooks: a model that is loaded once and called."""
