"""Stand-ins for CANN, the software below torch_npu: the real torch_npu runs on them, and no chip does."""
