LOADERS = {"clip": None}
