"""Frame selectors, one file each; :mod:`vtprune.video.selection` registers them."""
