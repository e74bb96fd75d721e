"""The commands of `swinsmt`, one a file; `cli` starts them."""
