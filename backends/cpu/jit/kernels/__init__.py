"""What is compiled: each module adds one function to a module of LLVM's, and says what it takes."""
