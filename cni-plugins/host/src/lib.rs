//! Network namespaces, links, addresses and routes over netlink; invoker of CNI plugin chains.
