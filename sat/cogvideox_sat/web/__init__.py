"""A page in the browser: videos from texts and pictures, a gallery, training followed live, and data sets shown."""
