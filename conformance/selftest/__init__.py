"""The suite examines itself: honest kernels as straight text, planted faults as edits of it, and which case kills which."""
