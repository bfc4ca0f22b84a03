"""Ways to approximate the Hessian: one file says everything that there is to know of one."""
