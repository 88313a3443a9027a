if __name__ != "isthmus.real":
    raise ImportError("import this package as isthmus.real, not as real")
