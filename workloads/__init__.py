if __name__ != "isthmus.workloads":
    raise ImportError("import this package as isthmus.workloads, not as workloads")
