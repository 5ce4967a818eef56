"""From a source of images to a data store: scan, assign, write, verify."""
