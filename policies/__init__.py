if __name__ != "isthmus.policies":
    raise ImportError("import this package as isthmus.policies, not as policies")
