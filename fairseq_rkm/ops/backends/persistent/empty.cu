// An empty kernel. The driver is asked how many of its blocks or clusters a GPU holds.
extern "C" __global__ void empty() {}
