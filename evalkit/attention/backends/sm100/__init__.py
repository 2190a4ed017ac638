"""The sparse MLA kernel that vLLM runs on SM100: as arithmetic in torch and in Triton, and the kernel itself."""
