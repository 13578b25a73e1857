"""Files of weights. The names of their types are here, where they cost no import."""

FLOAT_TYPES = ("bf16", "fp16", "fp32")
INT8 = "int8"  # of the large weights; all others stay in 16 bit
WEIGHT_TYPES = (*FLOAT_TYPES, INT8)
