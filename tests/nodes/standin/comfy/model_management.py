OOM_EXCEPTION = MemoryError
