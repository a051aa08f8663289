// The simulator's own controls, beside the launchers of csrc/cuda, for tests/simulated.py.
#include "cuda/launch.h"
#include "cuda/simulator.h"

extern "C" {

void saccade_sim_seed(uint64_t seed) { saccade::sim::block.random = seed * 2 + 1; }

// Kernels may touch what is shared and nothing else.
void saccade_sim_share(const void* data, int64_t bytes) {
  const char* at = static_cast<const char*>(data);
  saccade::sim::block.memory.push_back({at, at + bytes});
}
void saccade_sim_forget() { saccade::sim::block.memory.clear(); }

// Sizes of the structures that the tests spell out.
int64_t saccade_sim_size(int which) {
  using namespace saccade;
  return int64_t(which == 0 ? sizeof(Params) : which == 1 ? sizeof(GradParams) : sizeof(GatherParams));
}
}
