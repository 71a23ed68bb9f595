//! Pod decisions as pure functions: desired pods, observed pods and now in; actions and status out.
