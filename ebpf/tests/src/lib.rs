//! BPF_PROG_TEST_RUN tables and network-namespace tests of the data plane.
