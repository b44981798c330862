//! Both stores under one suite, and what is particular to each. Redis is a real server, started per test.

mod embedded;
mod redis_server;
mod remote;
mod suite;
