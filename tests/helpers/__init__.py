"""What tests share: a module a concern. Test files import from here, never from one another."""
