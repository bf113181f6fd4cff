"""The graph pass of ``torch.compile(backend="pybigmodel")``: imported when something is compiled.

nodes.py reads single calls, writes.py what they write to, chains.py finds what is one op,
lower.py puts the op there, pools.py those of poolings, layout.py keeps images in the layout that
others expect, weights.py keeps the packed weights.
"""
