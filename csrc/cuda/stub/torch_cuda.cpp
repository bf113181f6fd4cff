// Stands for libtorch_cuda.so while linking, since torch may be a CPU build here: it has the soname, and the one symbol
// that libpybigmodel_cuda.so takes from there, so that the linker can refuse every other undefined one. Never installed,
// never loaded.
extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(int /*device_index*/,
                                                                                         void** /*stream*/) {
  return 1;
}
