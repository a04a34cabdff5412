"""What is known of devices: their rates from data sheets, and what their drivers say of them."""
