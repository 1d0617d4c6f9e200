"""Kills, freezes and starves a whole mintweb under load, then proves that nothing was lost or done twice."""
