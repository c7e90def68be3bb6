"""The authors' instruments, in a checkout only: what a GPU does and could do, and each operator by itself."""
