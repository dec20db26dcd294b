"""The Ascend backend: the vendor's sparse attention operators of torch_npu."""
