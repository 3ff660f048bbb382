"""Published classification sets, as they are downloaded, as the class folders that training reads."""
