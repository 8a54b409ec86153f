// Whether torch's operators may mean something else just now.
#pragma once

namespace fastsgd {

// Whether a mode or a transform is on that may do what it likes with the operators of which torch
// makes a step: then they are to be called. A default device is none.
bool any_mode();

// Whether torch would make a tensor that is for no device in particular elsewhere than on the CPU.
bool default_device_is_another();

// Learns what torch's own modes are. To be called once, before any question.
void learn_modes();

}  // namespace fastsgd
