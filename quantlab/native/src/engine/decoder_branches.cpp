// Continuations of a decoder's sequence that are computed together: weights are read once for all of them, and so are the
// keys and values that they share.
//
// A branch has tiles of its own from the sequence's last one on, if that is not full, which is copied. Attention goes by
// chunks of positions that do not know where tiles lie, so a branch's bits are those of the sequence continued alone.
#include "decoder.h"

#include "decoder_checks.h"
#include "decoder_parts.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace quantlab::engine {

namespace {

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

}  // namespace

void Decoder::begin_branches(int count, int room) {
    const OnlyUser user(used_);
    branch_bytes(count, room);  // its checks
    if (room > context_ - position_) {
        refuse("branches of " + std::to_string(room) + " tokens do not fit: the context of " + std::to_string(context_) +
               " holds " + std::to_string(position_) + " already");
    }
    branches_.clear();  // their memory first
    std::vector<Branch> made;
    for (int i = 0; i < count; ++i) made.push_back(new_branch(room));
    branches_ = std::move(made);
    branch_room_ = room;
}

void Decoder::end_branches() {
    const OnlyUser user(used_);
    branches_.clear();
}

std::size_t Decoder::branch_bytes(int count, int room) const {
    if (count < 1 || count > most_branches) {
        refuse("count is " + std::to_string(count) + "; expected 1 to " + std::to_string(most_branches) + " branches");
    }
    if (room < 1 || room > context_) {
        refuse("room is " + std::to_string(room) + "; expected 1 to " + std::to_string(context_) + " tokens");
    }
    const double bytes = 2.0 * count * spec_.layers * spec_.kv_heads * static_cast<double>(branch_head_bytes(room));
    if (bytes > most_cache_bytes) refuse("branches of " + std::to_string(bytes) + " bytes are beyond all memory");
    return static_cast<std::size_t>(bytes);
}

// The most that one of a branch's key heads takes: a copied tile, and the tokens to come.
std::size_t Decoder::branch_head_bytes(int room) const {
    return head_cache_bytes(cache_type_, spec_.head_size, tile_positions - 1 + room);
}

Decoder::Branch Decoder::new_branch(int room) const {
    const std::size_t heads = static_cast<std::size_t>(spec_.layers) * spec_.kv_heads, bytes = branch_head_bytes(room);
    Branch branch{position_, new_storage(heads * bytes), new_storage(heads * bytes)};
    if (position_ % tile_positions == 0) return branch;
    const std::size_t tile = tile_bytes(cache_type_, spec_.head_size), last = tile * static_cast<std::size_t>(shared_tiles());
    for (std::size_t head = 0; head < heads; ++head) {
        std::memcpy(branch.keys.get() + head * bytes, key_cache_.get() + head * head_bytes_ + last, tile);
        std::memcpy(branch.values.get() + head * bytes, value_cache_.get() + head * head_bytes_ + last, tile);
    }
    return branch;
}

void Decoder::append_to_branches(const std::int32_t* given, const std::int32_t* given_branches, int count, float* logits) {
    const OnlyUser user(used_);
    if (count < 1) refuse("no tokens to append");
    const std::vector<std::int32_t> tokens(given, given + count);  // the caller's may change after the check
    const std::vector<std::int32_t> branches(given_branches, given_branches + count);
    check_branches(tokens, branches);
    int done = 0;
    try {
        while (done < count) {
            const int size = std::min(pass_tokens, count - done);
            float* out = logits + static_cast<std::size_t>(done) * spec_.vocabulary;
            pool_.run_as_pays([&](int thread) {
                run({size, size <= few_tokens, thread, branches.data() + done}, tokens.data() + done, out, size);
            });
            for (const int end = done + size; done < end; ++done) ++branches_[branches[done]].position;
        }
    } catch (...) {
        while (done > 0) --branches_[branches[--done]].position;
        throw;
    }
}

void Decoder::check_branches(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& branches) const {
    std::vector<bool> named(branches_.size());
    for (const std::int32_t token : tokens) check_token(token);
    for (const std::int32_t branch : branches) {
        if (branch < 0 || static_cast<std::size_t>(branch) >= branches_.size()) {
            refuse("branch " + std::to_string(branch) + ": there are " + std::to_string(branches_.size()));
        }
        if (named[branch]) refuse("branch " + std::to_string(branch) + " is named twice; it takes one token at a time");
        named[branch] = true;
        if (branches_[branch].position - position_ >= branch_room_) {
            refuse("branch " + std::to_string(branch) + " is full: it has room for " + std::to_string(branch_room_) + " tokens");
        }
    }
}

int Decoder::position_of(const Pass& pass, std::int64_t token) const {
    if (pass.branches == nullptr) return position_ + static_cast<int>(token);
    return branches_[pass.branches[token]].position;
}

CacheTiles Decoder::own_tiles(const Pass& pass, std::int64_t token, std::size_t head) const {
    const Branch& branch = branches_[pass.branches[token]];
    const std::size_t place = head * branch_head_bytes(branch_room_);
    return {branch.keys.get() + place, branch.values.get() + place};
}

// A token's key and value of a key head into the cache that it belongs to.
void Decoder::store(const Pass& pass, std::int64_t token, std::size_t head, const float* key, const float* value) {
    const bool own = pass.branches != nullptr;
    const Storage& keys = own ? branches_[pass.branches[token]].keys : key_cache_;
    const Storage& values = own ? branches_[pass.branches[token]].values : value_cache_;
    const std::size_t place = head * (own ? branch_head_bytes(branch_room_) : head_bytes_);
    const int at = position_of(pass, token) - (own ? shared_tiles() * tile_positions : 0);
    ops_.store_key(cache_type_, keys.get() + place, at, key, spec_.head_size);
    ops_.store_value(cache_type_, values.get() + place, at, value, spec_.head_size);
}

}  // namespace quantlab::engine
