"""From a source of images to the Arrow store: one file per kind of source, and the only writer of stores."""
