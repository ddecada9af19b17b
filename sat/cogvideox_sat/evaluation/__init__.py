"""Measures of videos and of VAEs."""
