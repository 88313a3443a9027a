if __name__ != "isthmus.experiments":
    raise ImportError("import this package as isthmus.experiments, not as experiments")
