def make(path, root): pass
