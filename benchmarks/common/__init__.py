"""What the scripts share: clocks, results that are kept, the problems and solvers of other packages."""
