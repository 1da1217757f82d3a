// Streams and captured graphs that end with their scope.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.cuh"

namespace quantloom {

// A stream that does not wait for the default one.
class Stream {
 public:
  Stream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }  // NOLINT(google-explicit-constructor)
  void synchronize() const { check_cuda(cudaStreamSynchronize(stream_), "synchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// What `work` puts into a stream, to be launched again and again.
class Graph {
 public:
  template <class Work>
  Graph(cudaStream_t stream, const Work& work) {
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
    try {
      work();
    } catch (...) {
      static_cast<void>(cudaStreamEndCapture(stream, &graph_));
      if (graph_ != nullptr) static_cast<void>(cudaGraphDestroy(graph_));
      static_cast<void>(cudaGetLastError());
      throw;
    }
    check_cuda(cudaStreamEndCapture(stream, &graph_), "end capture");
    check_cuda(cudaGraphInstantiate(&executable_, graph_, 0), "instantiate");
  }
  ~Graph() {
    static_cast<void>(cudaGraphExecDestroy(executable_));
    static_cast<void>(cudaGraphDestroy(graph_));
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const { check_cuda(cudaGraphLaunch(executable_, stream), "launch"); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// Uploads go through the default stream, for which other streams do not wait.
inline void settle() {
  check_cuda(cudaStreamSynchronize(nullptr), "default stream");
}

}  // namespace quantloom
