"""`nestd doctor`: checks of one machine, its broker and its bundle, one function a check."""
