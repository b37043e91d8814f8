"""How the steps of an index are called, and who shares one."""
