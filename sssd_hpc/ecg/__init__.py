"""ECGs as data: leads, statements, WFDB records, PTB-XL tables, the packed training store.

This room knows no model and no torch; arrays are numpy, leads are always called by name.
"""
