"""What is done end to end: building, fitting, calibrating, evaluating. A job brings sides together that know nothing of
each other; commands and the Python API show what it gives. Nothing here prints.
"""
