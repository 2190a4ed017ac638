"""How CUDA's writers round to the 8-bit and 4-bit number formats that rows hold."""
