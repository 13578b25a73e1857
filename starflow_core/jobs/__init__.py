# What a user may fix of how a job is fitted to a device; here, so that a command line can offer it without PyTorch.
CACHES = {"auto": (False, True), "full": (False,), "int8": (True,)}  # settled keys and values in 8 bit or not
NOWHERE, WEIGHTS, ALL = (False, False), (True, False), (True, True)  # weights and cache in main memory
OFFLOADS = {"auto": (NOWHERE, WEIGHTS, ALL), "none": (NOWHERE,), "weights": (WEIGHTS,), "all": (ALL,)}
CACHE_PLACES = {"auto": (False, True), "no": (False,), "yes": (True,)}  # settled keys and values in main memory or not
HOLDS = ("clip", "first-frame")  # what an edit by another prompt holds on to
