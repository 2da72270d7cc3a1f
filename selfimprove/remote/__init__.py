"""A store beside the run directory: a folder or an object store where published artifacts are kept too.

The run directory stays where work is done. `objects` knows single objects, `mirror` what of a run is kept and how.
"""
