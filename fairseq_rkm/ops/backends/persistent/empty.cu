// Nothing: what the driver is asked about, when the question is how many blocks or clusters a GPU holds.
extern "C" __global__ void empty() {}
