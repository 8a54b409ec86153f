// The threads that do long work: how many there are, and a region in which they share it.
#pragma once

#include <cstdint>

namespace fastsgd {

// How many threads a long step uses now: torch's number, and one in a forked child, where the
// threads of the parent's parallel regions, torch's or ours, do not exist and waiting for them
// would hang.
int threads();

// Lets threads() know of forks from now on. To be called once, before anything could fork.
void watch_forks();

// How many workers should share work that moves so many bytes.
int team_for(std::int64_t bytes);

// Calls do_share(work, share) once for each share in [0, team), on several threads where it can.
// Nothing may be thrown.
void in_team(int team, void (*do_share)(const void* work, int share), const void* work);

// Calls work(share), likewise.
template <class Work>
void in_team(int team, const Work& work) {
  const auto do_share = [](const void* w, int share) { (*static_cast<const Work*>(w))(share); };
  in_team(team, do_share, &work);
}

}  // namespace fastsgd
