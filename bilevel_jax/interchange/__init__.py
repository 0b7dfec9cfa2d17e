"""Finite MDPs from and to the forms of other libraries, one form a file; the methods of `MDP` are the way in.

Plain numpy and scipy, outside jit; none of those libraries is imported.
"""
