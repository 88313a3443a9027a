if __name__ != "isthmus.sim":
    raise ImportError("import this package as isthmus.sim, not as sim")
