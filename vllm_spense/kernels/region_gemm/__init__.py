"""GEMMs of a sparse and a dense region: a problem's description, the packed weight, and a file for each path.

Paths: `reference` (plain torch), `library` (cuSPARSELt and cuBLASLt), `one_launch` (our kernel), `dense` (a
dense copy).
"""
