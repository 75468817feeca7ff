#include "wire/mpi_wire.hpp"

#include <mpi.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace xc {
namespace {

constexpr int kNoticeTag = 32767;  // the largest that every MPI has

constexpr char kFinalized[] = "MPI was finalized while messages between teams were still to be sent";

// What MPI says of a code; nothing of success.
std::string words_for(int code, const char* doing) {
  if (code == MPI_SUCCESS) return {};
  char words[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, words, &length);
  return std::string(doing) + " failed: " + std::string(words, std::size_t(length));
}

void check(int code, const char* doing) {
  if (const std::string words = words_for(code, doing); !words.empty()) throw std::runtime_error(words);
}

// Programs may end MPI before they close their worlds.
bool finalized() {
  int ended = 0;
  MPI_Finalized(&ended);
  return ended != 0;
}

class MpiWire final : public Wire {
 public:
  MpiWire(MPI_Comm comm, std::size_t largest) : comm_(comm), largest_(largest) {
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
  }

  Transfer send(const void* from, std::size_t bytes, int rank, int tag) override {
    return begin(bytes, rank, [&](std::size_t offset, int count, MPI_Request* request) {
      const auto* at = static_cast<const char*>(from) + offset;
      return words_for(MPI_Isend(at, count, MPI_BYTE, rank, tag, comm_, request), "MPI_Isend");
    });
  }

  Transfer receive(void* to, std::size_t bytes, int rank, int tag) override {
    return begin(bytes, rank, [&](std::size_t offset, int count, MPI_Request* request) {
      auto* at = static_cast<char*>(to) + offset;
      return words_for(MPI_Irecv(at, count, MPI_BYTE, rank, tag, comm_, request), "MPI_Irecv");
    });
  }

  bool done(Transfer transfer) override {
    const auto found = under_way_.find(transfer);
    if (found == under_way_.end()) throw std::runtime_error("a transfer that is not under way was asked for");
    Pieces& pieces = found->second;
    int all = 0;
    if (pieces.error.empty() && finalized()) pieces.error = kFinalized;
    if (pieces.error.empty())
      pieces.error = words_for(MPI_Testall(static_cast<int>(pieces.requests.size()), pieces.requests.data(),
                                           &all, MPI_STATUSES_IGNORE),
                               "MPI_Testall");
    if (!pieces.error.empty()) throw WireError(pieces.error, pieces.rank);
    if (all) under_way_.erase(found);
    return all != 0;
  }

  bool ended() const override { return finalized(); }

  void progress() override {
    if (!finalized()) who_notifies();
  }

  void notify(int rank, const void* bytes) override {
    if (finalized()) return;
    Word& word = words_.emplace_back();
    std::memcpy(word.bytes, bytes, kNoticeBytes);
    check(MPI_Isend(word.bytes, kNoticeBytes, MPI_BYTE, rank, kNoticeTag, comm_, &word.request), "MPI_Isend");
    words_.remove_if([](Word& sent) {
      int done = 0;
      return MPI_Test(&sent.request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done;
    });
  }

  bool notice(void* bytes) override {
    if (finalized()) return false;
    const int rank = who_notifies();
    if (rank == MPI_PROC_NULL) return false;
    return MPI_Recv(bytes, kNoticeBytes, MPI_BYTE, rank, kNoticeTag, comm_, MPI_STATUS_IGNORE) == MPI_SUCCESS;
  }

  // What nobody took yet must not lose its bytes under MPI's hands.
  ~MpiWire() override {
    if (!words_.empty()) new std::list<Word>(std::move(words_));
  }

 private:
  struct Pieces {
    int rank;
    std::vector<MPI_Request> requests;
    std::string error;
  };
  struct Word {
    std::byte bytes[kNoticeBytes];
    MPI_Request request = MPI_REQUEST_NULL;
  };

  // A rank whose word is waiting, or MPI_PROC_NULL. MPI may refuse to look at all ranks once one of them is
  // lost; the others have words yet, perhaps about that one, and are looked at one by one.
  int who_notifies() const {
    int waiting = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, kNoticeTag, comm_, &waiting, &status) == MPI_SUCCESS)
      return waiting ? status.MPI_SOURCE : MPI_PROC_NULL;
    for (int rank = 0; rank < size_; ++rank)
      if (MPI_Iprobe(rank, kNoticeTag, comm_, &waiting, MPI_STATUS_IGNORE) == MPI_SUCCESS && waiting)
        return rank;
    return MPI_PROC_NULL;
  }

  template <class Begin>
  Transfer begin(std::size_t bytes, int rank, Begin begin_piece) {
    Pieces pieces{rank, {}, finalized() ? kFinalized : ""};
    for (std::size_t offset = 0; offset < bytes && pieces.error.empty(); offset += largest_)
      pieces.error = begin_piece(offset, static_cast<int>(std::min(bytes - offset, largest_)),
                                 &pieces.requests.emplace_back(MPI_REQUEST_NULL));
    under_way_.emplace(++last_, std::move(pieces));
    return last_;
  }

  MPI_Comm comm_;
  int size_ = 0;
  std::size_t largest_;
  Transfer last_ = 0;
  std::unordered_map<Transfer, Pieces> under_way_;
  std::list<Word> words_;
};

}  // namespace

std::string mpi_compiled_for() {
#if defined(OMPI_MAJOR_VERSION)
  return "Open MPI " + std::to_string(OMPI_MAJOR_VERSION) + "." + std::to_string(OMPI_MINOR_VERSION);
#elif defined(MPICH_VERSION)
  return "MPICH " MPICH_VERSION;
#else
  return "MPI of an unknown make";
#endif
}

std::size_t mpi_handle_size() { return sizeof(MPI_Comm); }

std::shared_ptr<Wire> make_mpi_wire(const void* communicator, std::size_t largest) {
  return std::make_shared<MpiWire>(*static_cast<const MPI_Comm*>(communicator), largest);
}

}  // namespace xc
