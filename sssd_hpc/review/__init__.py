"""Blinded questionnaires for physicians, and their scores: the paper's Tables V and VI.

`make` writes a page to send and a key to keep; `score` reads the key and the answers.
"""
