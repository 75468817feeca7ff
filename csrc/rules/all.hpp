#pragma once

#include "rules/adam.hpp"
#include "rules/adamp.hpp"
#include "rules/eg.hpp"
#include "rules/lamb.hpp"
#include "rules/lans.hpp"
#include "rules/lars.hpp"
#include "rules/rule.hpp"
#include "rules/sgd.hpp"
#include "rules/sgdp.hpp"
#include "rules/variance_reduced.hpp"

namespace xc {

// The one list of rules. Tables of kernels, the Python names and the tests are derived from it.
template <Family... F>
struct Families {};

using AllFamilies =
    Families<SgdFamily, AdamFamily, LarsFamily, ClarsFamily, LambFamily, LansFamily, VrSgdFamily,
             VrAdamFamily, VrLarsFamily, VrLambFamily, EgFamily, AdamPFamily, SgdPFamily>;

}  // namespace xc
