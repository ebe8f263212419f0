# The lab's simulated AWS API, for whoever types `hostagent` in a shell of this instance.
export AWS_ENDPOINT_URL=http://169.254.169.5
