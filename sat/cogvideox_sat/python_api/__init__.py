"""The Python interface, `import cogvideox_sat`: a model that is loaded once and called."""
