manual_cast = None
